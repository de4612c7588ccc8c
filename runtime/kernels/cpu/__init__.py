"""C++ kernels, compiled at first use, with the pure-torch path behind them."""
