"""Intercept: products that modules write as operations run as the policy says, each as it runs."""
