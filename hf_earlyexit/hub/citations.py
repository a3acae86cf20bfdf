"""Which paper a policy comes from, as BibTeX."""

from __future__ import annotations

from collections.abc import Iterable

BEEM = """@inproceedings{bajpai2025beem,
  title     = {BEEM: Boosting Performance of Early Exit DNNs using Multi-Exit Classifiers as Experts},
  author    = {Bajpai, Divya Jyoti and Hanawal, Manjesh Kumar},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2502.00745}
}"""
PABEE = """@inproceedings{zhou2020bert,
  title     = {BERT Loses Patience: Fast and Robust Inference with Early Exit},
  author    = {Zhou, Wangchunshu and Xu, Canwen and Ge, Tao and McAuley, Julian and Xu, Ke and Wei, Furu},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020},
  note      = {arXiv:2006.04152}
}"""
DEEBERT = """@inproceedings{xin2020deebert,
  title     = {DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference},
  author    = {Xin, Ji and Tang, Raphael and Lee, Jaejun and Yu, Yaoliang and Lin, Jimmy},
  booktitle = {Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics},
  year      = {2020}
}"""
CITATIONS = {
    "beem": BEEM,
    "beem-a": BEEM,
    "beem-c": BEEM,
    "beem-calibrated": BEEM,
    "patience": PABEE,
    "entropy": DEEBERT,
}  # policies that are not here are common practice, or of third parties


def citations(policies: Iterable[str]) -> list[str]:
    """The BibTeX entries of these policies, each once, in their order."""
    return list(dict.fromkeys(CITATIONS[name] for name in policies if name in CITATIONS))
