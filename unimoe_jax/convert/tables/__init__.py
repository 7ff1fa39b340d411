"""Which source tensor becomes which parameter, one module per model family: data, not code."""
