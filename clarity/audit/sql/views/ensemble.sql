-- The class that the ensemble predicts for each image, and its probability. With --predictor the source of an image is
-- the predictor's class, so that the ensemble's is read from probs.
CREATE VIEW ensemble AS
SELECT image_id,
       CAST(list_position(CAST(probs AS FLOAT[]), list_max(CAST(probs AS FLOAT[]))) - 1 AS INTEGER) AS class,
       list_max(CAST(probs AS FLOAT[])) AS prob
FROM codes
WHERE status = 'ok';
