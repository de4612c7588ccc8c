"""The layer and its ops: FWD, BWD and GRAD as one autograd function, and the lp dialect that graphs are written in."""
