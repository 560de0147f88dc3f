"""From a backbone to a classifier: heads, and the folder of a trained one."""
