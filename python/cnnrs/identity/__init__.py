"""What a Python object computes, as a key: its code, its state, its versions."""
