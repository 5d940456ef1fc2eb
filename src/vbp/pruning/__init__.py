"""From statistics to a smaller model: scores, plan, compensation, surgery."""
