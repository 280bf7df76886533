"""A loss, a target, a regularizer and a solver of one's own, from outside the package.

They are those of the page that shows how to write them.
"""

import locoprop_optax as loco
from tests.helpers import DOCS, counted, local_steps, regression, run_blocks, train_step


def test_one_of_each_trains_a_model_together():
    own = run_blocks((DOCS / "your_own.md").read_text())
    assert own["history"][-1] < 0.6 * own["history"][0]
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = local_steps(
        layers,
        0.5,
        loss=lambda transfer: own["HuberLoss"](0.5),
        target=own["sign_target"](0.05),
        regularizer=own["LogCosh"](0.1),
        solver=own["steepest_descent"](5),
    )
    step, traces = counted(train_step(loss_fn, layers, tx))
    state = tx.init(params)
    start = loss_fn(params, batch)
    for _ in range(40):
        params, state, loss = step(params, state, batch)
    assert loss < 0.6 * start
    assert len(traces) == 1
