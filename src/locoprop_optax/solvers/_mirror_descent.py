"""Mirror descent in the geometry of the regularizer."""

from locoprop_optax._utils.errors import LayerError
from locoprop_optax._utils.hyperparams import check_count
from locoprop_optax.solvers._solver import Solver, repeat


def mirror_descent(num_steps: int = 1) -> Solver:
    r"""Steps that minimize the linearized loss and the regularizer together.

    Each step holds on to where the last one went. With the divergence
    :math:`D_\psi` and the strength :math:`\lambda` of a Bregman regularizer,

    .. math::
      \theta_{k+1} = \arg\min_\theta\ \langle \nabla \ell(\theta_k), \theta \rangle
      + \lambda D_\psi(\theta, \theta_k)
      = (\nabla\psi)^{-1}\big( \nabla\psi(\theta_k)
      - \tfrac1\lambda \nabla \ell(\theta_k) \big) .

    The step size is :math:`1 / \lambda`. With `regularizers.relative_entropy` one step
    is the exponentiated gradient, with `regularizers.signed_entropy` that for weights
    of both signs, with `regularizers.squared_l2` gradient descent.

    Args:
      num_steps: at least 1.

    Returns:
      The solver.

    Raises:
      TypeError: if `num_steps` is no Python int.
      ValueError: if `num_steps` is below 1; when a step is traced, if the regularizer
        has no `mirror_step`. The message names the layer.

    Example:
      As the options of `scale_by_locoprop(layers, **exponentiated_gradient)`:

      >>> import locoprop_optax as loco
      >>> exponentiated_gradient = dict(
      ...     target=loco.targets.gradient_descent(1.0),
      ...     regularizer=loco.regularizers.relative_entropy(10.0),
      ...     solver=loco.solvers.mirror_descent())

    References:
      Kivinen, Warmuth, "Exponentiated Gradient versus Gradient Descent for Linear
      Predictors", 1997; Beck, Teboulle, "Mirror descent", 2003.
    """
    check_count("num_steps", num_steps)

    def solve_layer(problem):
        mirror_step = getattr(problem.regularizer, "mirror_step", None)
        if mirror_step is None:
            raise LayerError(
                "mirror_descent needs a regularizer with a mirror_step, such as "
                "regularizers.squared_l2, relative_entropy or signed_entropy, got "
                f"{problem.regularizer}."
            )

        def later_step(step, _):
            gradient = problem.loss_gradient(step)
            return mirror_step(step, gradient, problem.params)

        first = mirror_step(problem.no_step(), problem.initial_gradient, problem.params)
        return repeat(later_step, first, range(1, num_steps), problem)

    def solve(problems, state, count):
        del count
        return problems.map(solve_layer), state

    return Solver(lambda params, layers: (), solve, scales_gradient=True)
