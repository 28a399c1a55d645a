-- Number of images by your model's prediction, the ensemble's class (source) and the label. Exists if codes has
-- predictions. The ensemble's class is read from probs, because with --predictor the source is the prediction.
CREATE VIEW agreement AS
SELECT prediction,
       CAST(list_position(CAST(probs AS FLOAT[]), list_max(CAST(probs AS FLOAT[]))) - 1 AS INTEGER) AS source,
       label,
       count(*) AS images
FROM codes
WHERE status = 'ok'
GROUP BY ALL;
