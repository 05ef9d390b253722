"""The bidirectional language model: char CNN, LSTM with projection, softmax."""
