"""lm-eval's own command line, with the model `layerscope`: `python -m layerscope_jax.evaluation run ...`."""

import sys


def main() -> None:
    """Runs lm-eval's command line."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        sys.exit("error: this needs lm_eval, which is not installed: pip install 'layerscope-jax[eval]'")
    import layerscope_jax.evaluation.lm_eval_model  # noqa: F401 registers the model

    cli_evaluate()


if __name__ == "__main__":
    main()
