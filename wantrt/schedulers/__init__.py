"""Sigma grids and solvers. A solver is data: one row of coefficients a step, computed in float64."""
