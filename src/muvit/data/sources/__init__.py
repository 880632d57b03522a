"""Public data sets as downloaded: a module for each, whose ``find_<name>`` lists its slides; `prepare` converts."""
