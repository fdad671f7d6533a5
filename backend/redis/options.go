package redis

import (
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dchannel/dchannel"
)

// The defaults of the options.
const (
	DefaultNamespace         = "dchannel"
	DefaultRetentionMessages = 16_384
	DefaultRetention         = 10 * time.Minute
	DefaultIdleExpiry        = 24 * time.Hour
	DefaultProbeInterval     = 5 * time.Second
	DefaultProbeTimeout      = 3 * time.Second
)

// Option sets up a [Backend]. A value out of bounds is reported by the first call of
// a method, and by all later ones, as [dchannel.ErrInvalidOption].
type Option func(*options)

type options struct {
	namespace     string
	messages      int
	retention     time.Duration
	idle          time.Duration
	probeInterval time.Duration
	probeTimeout  time.Duration
	durable       bool
	logger        *slog.Logger

	err error // the first bad option
}

func defaults() options {
	return options{
		namespace:     DefaultNamespace,
		messages:      DefaultRetentionMessages,
		retention:     DefaultRetention,
		idle:          DefaultIdleExpiry,
		probeInterval: DefaultProbeInterval,
		probeTimeout:  DefaultProbeTimeout,
		logger:        slog.Default(),
	}
}

// WithNamespace sets what the keys of this backend begin with, and so which channels
// it shares with others: 1 to 64 bytes of UTF-8 without braces and control
// characters. The default is "dchannel".
func WithNamespace(name string) Option {
	return func(o *options) {
		o.namespace = name
		if name == "" || len(name) > 64 || !utf8.ValidString(name) ||
			strings.ContainsAny(name, "{}") || strings.ContainsFunc(name, unicode.IsControl) {
			o.invalid("WithNamespace: %q is not 1 to 64 bytes of UTF-8 without braces and control characters", name)
		}
	}
}

// WithRetention sets what is kept for listeners that were away: at least the last
// messages of a channel (1 or more), for d after the last one (1 ms or more). The
// default is 16,384 messages and 10 minutes. A process trims what it appends to, so
// all publishers should use the same values.
func WithRetention(messages int, d time.Duration) Option {
	return func(o *options) {
		o.messages, o.retention = messages, d
		if messages < 1 {
			o.invalid("WithRetention: messages is %d, at least 1 is needed", messages)
		}
		o.atLeast("WithRetention: the duration", d, time.Millisecond)
	}
}

// WithIdleExpiry sets how long a channel's epoch and sequence number outlive its last
// message (1 ms or more; the default is 24 hours). Later the channel begins anew. It
// is never shorter than twice the retention, whatever is set here.
func WithIdleExpiry(d time.Duration) Option {
	return func(o *options) {
		o.idle = d
		o.atLeast("WithIdleExpiry: the duration", d, time.Millisecond)
	}
}

// WithProbe sets after which silence the connection that messages come from is
// probed, and how long an answer may take before it is given up (10 ms or more each).
// The defaults are 5 s and 3 s. The timeout bounds an attempt to connect, too.
func WithProbe(interval, timeout time.Duration) Option {
	return func(o *options) {
		o.probeInterval, o.probeTimeout = interval, timeout
		o.atLeast("WithProbe: the interval", interval, 10*time.Millisecond)
		o.atLeast("WithProbe: the timeout", timeout, 10*time.Millisecond)
	}
}

// WithDurable declares that a restart of the server, or a failover to another one,
// loses nothing that was acknowledged: appendonly is on, appendfsync is always, and
// there is no replica that could be promoted without having everything. A restart is
// then not a loss. If it is not true, messages can be lost without a [dchannel.LostError].
//
// Where only some processes of a namespace say so, the stricter ones win.
func WithDurable() Option {
	return func(o *options) { o.durable = true }
}

// WithLogger sets where interruptions and foreign data are logged; not nil. The
// default is [slog.Default]. No payload is ever logged.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) {
		if l == nil {
			o.invalid("WithLogger: the logger is nil")
			return
		}
		o.logger = l
	}
}

func (o *options) atLeast(what string, d, bound time.Duration) {
	if d < bound {
		o.invalid("%s is %v, at least %v is needed", what, d, bound)
	}
}

// invalid notes the first bad option.
func (o *options) invalid(format string, args ...any) {
	if o.err == nil {
		o.err = fmt.Errorf("%w: redis."+format, append([]any{dchannel.ErrInvalidOption}, args...)...)
	}
}

// millis rounds up, so that nothing lives shorter than was asked for.
func millis(d time.Duration) int64 {
	return int64((d + time.Millisecond - 1) / time.Millisecond)
}
