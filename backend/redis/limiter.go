package redis

import (
	"sync/atomic"
	"time"
)

// limiter lets through one event a second: what others write into our keys must not
// flood our log.
type limiter struct{ last atomic.Int64 }

func (l *limiter) ok(now time.Time) bool {
	last, ns := l.last.Load(), now.UnixNano()
	return ns-last >= int64(time.Second) && l.last.CompareAndSwap(last, ns)
}

// foreign logs data that is not ours, at a place that is. The core will see a gap.
func (b *Backend) foreign(where, channel string, err error) {
	if b.noise.ok(time.Now()) {
		b.o.logger.Warn("redis: foreign data is skipped", "where", where, "channel", channel, "error", err)
	}
}
