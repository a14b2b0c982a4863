"""What pieces of a transformer layer cost, in closed form: the building blocks that `kinds/` and `planning/` add up. No torch."""
