-- How many images have each combination of your model's prediction, the ensemble's class (source) and the label.
-- It exists where codes has predictions. With --predictor the source of codes is the prediction itself, so that the
-- ensemble's class is read from probs.
CREATE VIEW agreement AS
SELECT prediction,
       CAST(list_position(CAST(probs AS FLOAT[]), list_max(CAST(probs AS FLOAT[]))) - 1 AS INTEGER) AS source,
       label,
       count(*) AS images
FROM codes
WHERE status = 'ok'
GROUP BY ALL;
