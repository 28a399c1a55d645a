"""Training of the VAE and the classifiers: loops, optimiser, resumable stages and evaluation."""
