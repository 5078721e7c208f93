"""What every loss of post-training returns: pretraining's sums, under the name that this package knows them by."""

from pretrain.sums import LossOutput, Mean, masked_mean

__all__ = ["LossOutput", "Mean", "masked_mean"]
