-- Labels of the data, and those that are a class of the model.
SELECT count(label_name), count(label) FROM codes
