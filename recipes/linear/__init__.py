"""Linear models on sparse data: a comparison of methods on a cluster that you describe."""
