"""Train the VAE and the classifiers: loops know mathematics, stages know files and resumption."""
