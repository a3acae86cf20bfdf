"""Text written token by token: each token leaves the decoder where it is decided."""
