"""The residual's two scalings: the multiplier in the forward pass, and the init of what writes to the stream."""

question = "Do spikes and sinks depend on how the residual is scaled?"
common = {"bos": True}
seeds = [1, 2, 3]
arms = {
    "one": "prenorm",
    "inv_sqrt_2L": "scaled_residual",
    "half": "half_residual",
    "layerscale": "layerscale",
    "rezero": "rezero",
    "flat_init": "flat_init",
    "post": "postnorm",
    "deepnorm": "deepnorm",
}
hypotheses = ["H7"]
