"""The forms of the marginal branch on real video, at as many tokens as the method is for: 16,384 and more."""
