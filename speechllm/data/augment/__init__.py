"""Augmentation of training utterances: speed, rooms, noise, babble, telephone, codecs, volume, SpecAugment."""
