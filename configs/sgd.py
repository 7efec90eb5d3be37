"""SGD with momentum."""

optimizer = "sgd"
learning_rate = 0.1
min_lr = 0.01
