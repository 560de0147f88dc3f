"""One network: lowered to a graph of plain operations, cut, filled with weights, played in Python."""
