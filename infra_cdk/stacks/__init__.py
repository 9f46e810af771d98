"""The three stacks, in the order in which they are deployed: state, training, serving."""
