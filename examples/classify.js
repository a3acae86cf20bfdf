// Answers with no Python: an exported folder in node, with onnxruntime-node.
//
//   npm install onnxruntime-node
//   hf-earlyexit export onnx bert-with-exits models/bert --layout triton
//   echo '[101, 2023, 3185, 102]' | node examples/classify.js models/bert
//
// Every line of standard input holds the token ids of one text, as its tokenizer gives them; every line of the output its
// label, the layer it left after, and its score there.

const fs = require("node:fs");
const path = require("node:path");
const readline = require("node:readline");
const ort = require("onnxruntime-node");

const row = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

async function main(folder) {
  const session = await ort.InferenceSession.create(path.join(folder, "1", "model.onnx"));
  const labels = fs.readFileSync(path.join(folder, "labels.txt"), "utf8").split("\n");
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const ids = JSON.parse(line);
    const { logits, exit_layer, exit_score } = await session.run({
      input_ids: row(ids),
      attention_mask: row(ids.map(() => 1)),
      token_type_ids: row(ids.map(() => 0)),
    });
    const best = logits.data.indexOf(Math.max(...logits.data));
    console.log(JSON.stringify({
      label: labels[best],
      exit_layer: Number(exit_layer.data[0]),
      exit_score: exit_score.data[0],
    }));
  }
}

main(process.argv[2]).catch((error) => { console.error(error.message); process.exit(1); });
