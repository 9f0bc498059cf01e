"""The rotary embeddings that `make_goldens.py` makes golden values of."""

# The context, the rotary embedding, and the lengths of sequences that it is asked for.
ROTARY = [
    {"max_position_embeddings": 128, "rope_parameters": parameters, "lengths": lengths}
    for parameters, lengths in [
        ({"rope_type": "linear", "factor": 4.0}, [None]),
        ({"rope_type": "dynamic", "factor": 4.0}, [100, 128, 200, 500]),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, [None]),
        (
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 0.5,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "truncate": False,
            },
            [None],
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.1,
                "partial_rotary_factor": 0.5,
            },
            [None],
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            [None],
        ),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0],
                "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0],
                "original_max_position_embeddings": 32,
            },
            [32, 33],
        ),
    ]
]
