package etcd

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dchannel/dchannel"
)

// Option changes one setting of a [Backend].
type Option func(*options)

// The defaults of the options.
const (
	DefaultNamespace         = "dchannel"
	DefaultRetentionMessages = 16_384
	DefaultRetention         = 10 * time.Minute
	DefaultIdleExpiry        = 24 * time.Hour
	DefaultProbeInterval     = 5 * time.Second
	DefaultProbeTimeout      = 3 * time.Second
)

type options struct {
	namespace    string
	messages     int
	retention    time.Duration
	idle         time.Duration
	probeEvery   time.Duration
	probeTimeout time.Duration
	logger       *slog.Logger
}

func defaults() options {
	return options{
		namespace:    DefaultNamespace,
		messages:     DefaultRetentionMessages,
		retention:    DefaultRetention,
		idle:         DefaultIdleExpiry,
		probeEvery:   DefaultProbeInterval,
		probeTimeout: DefaultProbeTimeout,
		logger:       slog.New(slog.DiscardHandler),
	}
}

// WithNamespace sets the prefix of all keys; the default is "dchannel". Channels of
// one name in two namespaces are two channels. It is 1 to 128 bytes of UTF-8
// without control characters, and may contain slashes, but no part between them may be id,
// head, log or lock.
func WithNamespace(namespace string) Option {
	return func(o *options) { o.namespace = namespace }
}

// WithRetention sets what is kept of each channel for listeners that were away: at least the last
// so many messages (1 or more), each for at least d (1 ms or more, rounded up to whole seconds). The
// defaults are 16,384 messages and 10 minutes. All processes that publish to a channel should use the same.
func WithRetention(messages int, d time.Duration) Option {
	return func(o *options) { o.messages, o.retention = messages, d }
}

// WithIdleExpiry sets for how long the position of a channel is remembered after its last
// message (1 ms or more, rounded up to whole seconds); the default is 24 hours. It is never shorter than the retention. All
// processes of a namespace should use the same.
func WithIdleExpiry(d time.Duration) Option {
	return func(o *options) { o.idle = d }
}

// WithProbe sets how often the server is asked for a sign of life while anything is subscribed, and
// how long it may take. The defaults are 5 and 3 seconds; the least is 10 milliseconds.
func WithProbe(interval, timeout time.Duration) Option {
	return func(o *options) { o.probeEvery, o.probeTimeout = interval, timeout }
}

// WithLogger sets where interruptions and recoveries are told. By default they are not.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) { o.logger = l }
}

func (o *options) check() error {
	bad := func(option string, value any, want string) error {
		return fmt.Errorf("%w: %s: %v, want %s", dchannel.ErrInvalidOption, option, value, want)
	}
	const maxTime = 10 * 365 * 24 * time.Hour
	switch {
	case o.namespace == "" || len(o.namespace) > 128 || !utf8.ValidString(o.namespace) ||
		strings.ContainsFunc(o.namespace, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return bad("WithNamespace", fmt.Sprintf("%q", o.namespace), "1 to 128 bytes of UTF-8 without control characters")
	case slices.ContainsFunc(strings.Split(o.namespace, "/"), reserved):
		return bad("WithNamespace", fmt.Sprintf("%q", o.namespace), "no part named id, head, log or lock")
	case o.messages < 1:
		return bad("WithRetention", o.messages, "at least 1 message")
	case o.retention < time.Millisecond || o.retention > maxTime:
		return bad("WithRetention", o.retention, "1ms to 10 years")
	case o.idle < time.Millisecond || o.idle > maxTime:
		return bad("WithIdleExpiry", o.idle, "1ms to 10 years")
	case o.probeEvery < 10*time.Millisecond:
		return bad("WithProbe", o.probeEvery, "an interval of at least 10ms")
	case o.probeTimeout < 10*time.Millisecond:
		return bad("WithProbe", o.probeTimeout, "a timeout of at least 10ms")
	case o.logger == nil:
		return bad("WithLogger", "nil", "a logger")
	}
	o.idle = max(o.idle, o.retention)
	return nil
}
