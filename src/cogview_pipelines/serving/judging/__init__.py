"""People's judgement of pictures, as in appendix E of CogView: https://arxiv.org/abs/2105.13290."""
