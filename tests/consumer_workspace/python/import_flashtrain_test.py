"""The whole package: flashtrain and the consumer's packages of the same names, side by side."""

import models
import ops
import train

import flashtrain
import flashtrain.models
import flashtrain.ops.layer_norm
import flashtrain.train

assert flashtrain.__version__
for own in (models, ops, train):
    assert own.OWNER == "consumer", own.__file__
print("flashtrain", flashtrain.__version__)
