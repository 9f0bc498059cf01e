"""How well a model predicts texts: log-likelihoods, perplexity, and a model of lm-eval."""
