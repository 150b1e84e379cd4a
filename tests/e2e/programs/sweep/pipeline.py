"""A model is fitted for each combination of parameters; what comes out stays in `Fit.results` for other programs to read."""

import itertools

from p2pcluster import Pipeline, current, source, stage


@source
def Grid():
    params = current().params
    for rate, power in itertools.product(params["rates"], params["powers"]):
        yield {"rate": rate, "power": power}


@stage(retries=0)
def Fit(setting):
    """Gradient descent for y = x ** power, from 0; a rate that is too large runs away, and the item is parked."""
    weight = 0.0
    samples = [0.1 * n for n in range(1, 11)]
    for _ in range(200):
        slope = sum(2 * (weight * x - x ** setting["power"]) * x for x in samples) / len(samples)
        weight -= setting["rate"] * slope
        if abs(weight) > 1e6:
            raise ArithmeticError(f"the rate {setting['rate']} is too large")
    loss = sum((weight * x - x ** setting["power"]) ** 2 for x in samples)
    return {**setting, "weight": round(weight, 4), "loss": loss}


pipeline = Pipeline("sweep", Grid >> Fit, params={"rates": [0.1, 0.5], "powers": [1, 2]})

if __name__ == "__main__":
    pipeline.main()
