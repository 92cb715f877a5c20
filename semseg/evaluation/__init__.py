"""From probabilities to scores: metrics, multi-scale inference, evaluation over ranks, tables.

Pages live in reports/, losses in training/.
"""
