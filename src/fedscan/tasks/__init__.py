"""What is learned: the loss, the scores and the prediction of each kind of task."""
