"""The front end `export`: one FX graph of the whole frozen model, traced by torch.export."""
