package memory

import (
	"fmt"
	"math"
	"time"

	"github.com/dchannel/dchannel"
)

// An Option sets up a [Store]. A value out of bounds is reported by the first call
// of a backend's method (and all later ones), as [dchannel.ErrInvalidOption].
type Option func(*Store)

// The defaults of the options.
const (
	DefaultRetentionMessages = 16_384
	DefaultRetention         = 10 * time.Minute
	DefaultIdleExpiry        = 24 * time.Hour
)

// WithRetention sets how many messages a channel keeps at least for listeners
// that catch up (1 or more), and for how long at most (1 ms or more, in steps of
// 1 ms). The default is 16,384 messages and 10 minutes.
func WithRetention(messages int, d time.Duration) Option {
	return func(s *Store) {
		s.maxRecords, s.maxAge = messages, millis(d)
		if messages < 1 {
			s.invalid("WithRetention: messages is %d, at least 1 is needed", messages)
		}
		if d < time.Millisecond {
			s.invalid("WithRetention: the duration is %v, at least 1ms is needed", d)
		}
	}
}

// WithIdleExpiry sets how long the epoch and sequence number of an open channel
// outlive its last message, counted from when that was accepted (1 ms or more, in
// steps of 1 ms; the default is 24 hours). Later the channel begins anew. It is
// never shorter than the retention, whatever is set here.
func WithIdleExpiry(d time.Duration) Option {
	return func(s *Store) {
		s.idleExpiry = millis(d)
		if d < time.Millisecond {
			s.invalid("WithIdleExpiry: the duration is %v, at least 1ms is needed", d)
		}
	}
}

// invalid notes the first bad option.
func (s *Store) invalid(format string, args ...any) {
	if s.badOption == nil {
		s.badOption = fmt.Errorf("%w: memory."+format, append([]any{dchannel.ErrInvalidOption}, args...)...)
	}
}

// millis rounds up, so that nothing lives shorter than was asked for.
func millis(d time.Duration) int64 {
	ms := d.Milliseconds()
	if d%time.Millisecond > 0 {
		ms++
	}
	return ms
}

// duration is the way back, for as long as a Duration can be.
func duration(ms int64) time.Duration {
	return time.Duration(min(ms, math.MaxInt64/int64(time.Millisecond))) * time.Millisecond
}
