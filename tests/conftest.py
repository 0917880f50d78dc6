"""What every test shares; that it lies here makes `models` and the other modules beside it importable."""
