-- How many images have each combination of your model's prediction, the ensemble's class (source) and the label.
-- It exists where codes has predictions.
CREATE VIEW prediction_agreement AS
SELECT prediction, class AS source, label, count(*) AS images
FROM codes JOIN ensemble USING (image_id)
GROUP BY ALL;
