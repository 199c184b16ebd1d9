"""What a training run needs besides its loop, which is in recipes/train.py."""
