-- How many images have each combination of your model's prediction, the ensemble's class (source) and the label.
-- It exists where codes has predictions.
CREATE VIEW agreement AS
SELECT prediction, source, label, count(*) AS images
FROM codes
WHERE status = 'ok'
GROUP BY ALL;
