"""The stacks, in the order in which they are deployed: state, training, serving, and workflows where it is asked for."""
