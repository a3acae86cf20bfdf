"""The papers that methods come from, as BibTeX: each policy and objective names its own in `citation`."""

BEEM = """@inproceedings{bajpai2025beem,
  title     = {BEEM: Boosting Performance of Early Exit DNNs using Multi-Exit Classifiers as Experts},
  author    = {Bajpai, Divya Jyoti and Hanawal, Manjesh Kumar},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2502.00745}
}"""
CALM = """@inproceedings{schuster2022confident,
  title     = {Confident Adaptive Language Modeling},
  author    = {Schuster, Tal and Fisch, Adam and Gupta, Jai and Dehghani, Mostafa and Bahri, Dara and Tran, Vinh Q. and
               Tay, Yi and Metzler, Donald},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022},
  note      = {arXiv:2207.07061}
}"""
CONSISTENTEE = """@inproceedings{zeng2024consistentee,
  title     = {ConsistentEE: A Consistent and Hardness-Guided Early Exiting Method for Accelerating Language Models
               Inference},
  author    = {Zeng, Ziqian and Hong, Yihuai and Dai, Hongliang and Zhuang, Huiping and Chen, Cen},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2024},
  note      = {arXiv:2312.11882}
}"""
DEEBERT = """@inproceedings{xin2020deebert,
  title     = {DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference},
  author    = {Xin, Ji and Tang, Raphael and Lee, Jaejun and Yu, Yaoliang and Lin, Jimmy},
  booktitle = {Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics},
  year      = {2020}
}"""
LAYERSKIP = """@inproceedings{elhoushi2024layerskip,
  title     = {LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding},
  author    = {Elhoushi, Mostafa and Shrivastava, Akshat and Liskovich, Diana and Hosmer, Basil and Wasti, Bram and
               Lai, Liangzhen and Mahmoud, Anas and Acun, Bilge and Agarwal, Saurabh and Roman, Ahmed and Aly, Ahmed A and
               Chen, Beidi and Wu, Carole-Jean},
  booktitle = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics},
  year      = {2024},
  note      = {arXiv:2404.16710}
}"""
MUE = """@inproceedings{tang2023you,
  title     = {You Need Multiple Exiting: Dynamic Early Exiting for Accelerating Unified Vision Language Model},
  author    = {Tang, Shengkun and Wang, Yaqing and Kong, Zhenglun and Zhang, Tianchi and Li, Yao and Ding, Caiwen and
               Wang, Yanzhi and Liang, Yi and Xu, Dongkuan},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2023},
  note      = {arXiv:2211.11152}
}"""
PABEE = """@inproceedings{zhou2020bert,
  title     = {BERT Loses Patience: Fast and Robust Inference with Early Exit},
  author    = {Zhou, Wangchunshu and Xu, Canwen and Ge, Tao and McAuley, Julian and Xu, Ke and Wei, Furu},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020},
  note      = {arXiv:2006.04152}
}"""
