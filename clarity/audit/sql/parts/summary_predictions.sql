-- Images with a prediction, and those on which the ensemble agrees.
SELECT coalesce(sum(images) FILTER (prediction IS NOT NULL), 0)::BIGINT AS images,
       coalesce(sum(images) FILTER (prediction = source), 0)::BIGINT AS agree
FROM prediction_agreement
