"""The residual's two scalings: the multiplier in the forward pass, and the init of what writes to the stream."""

question = "Do spikes and sinks depend on how the residual is scaled?"
common = {"bos": True}
seeds = [1, 2, 3, 4, 5, 6]
contrasts = [("inv_sqrt_2L", "top1/median"), ("half", "top1/median"), ("flat_init", "Sink_1")]
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
