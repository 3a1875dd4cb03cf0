"""The method: sampling, log-probs, delta reward, advantages, loss, tree."""
