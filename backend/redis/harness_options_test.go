package redis_test

import (
	"log/slog"

	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/dchannel/dchannel/backend/redis"
)

var (
	quiet         = redis.WithLogger(slog.New(slog.DiscardHandler))
	noMaintenance = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
)
