package nats

import (
	"fmt"
	"log/slog"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/dchannel/dchannel"
)

// Option sets up a Backend. A value out of bounds is reported by the first call as
// dchannel.ErrInvalidOption.
type Option func(*options)

type options struct {
	namespace     string
	messages      int
	retention     time.Duration
	idle          time.Duration
	probeInterval time.Duration
	probeTimeout  time.Duration
	logger        *slog.Logger
	replicas      int // 0: 1 for a new stream, and whatever an existing one has
	storage       jetstream.StorageType
	err           error
}

func defaults() options {
	return options{
		namespace: "dchannel", messages: 16384, retention: 10 * time.Minute, idle: 24 * time.Hour,
		probeInterval: 5 * time.Second, probeTimeout: 3 * time.Second,
		logger: slog.New(slog.DiscardHandler), storage: jetstream.FileStorage,
	}
}

// WithNamespace sets the stream's name and the first token of every subject, by
// default "dchannel". Backends with the same namespace share their channels. It is
// 1 to 64 bytes of UTF-8 without control characters; what a subject token cannot
// hold is percent-encoded.
func WithNamespace(namespace string) Option {
	return func(o *options) {
		ok := len(namespace) >= 1 && len(namespace) <= 64 && utf8.ValidString(namespace)
		for _, r := range namespace {
			ok = ok && r >= ' ' && (r < 0x7f || r > 0x9f)
		}
		o.require(ok, "WithNamespace(%q): want 1 to 64 bytes of UTF-8 without control characters", namespace)
		o.namespace = namespace
	}
}

// WithRetention sets how much of a channel is kept at least, for listeners that
// were away: the last `messages`, by default 16,384, as long as they are not older
// than d, by default 10 minutes.
//
// The server counts appends, and one append may hold many messages, so that more
// may be kept, and nothing bounds the bytes: 16,384 appends of 1 MiB are 16 GiB. The
// count is a setting of the stream, and so the same for everyone in a namespace;
// messages older than d are deleted while the channel is being published to, and
// what is left goes with the channel's bookkeeping ([WithIdleExpiry]).
//
// messages is 1 to 10,000,000, and d a second to 10 years.
func WithRetention(messages int, d time.Duration) Option {
	return func(o *options) {
		o.require(messages >= 1 && messages <= 10_000_000, "WithRetention(%d messages): want 1 to 10,000,000", messages)
		o.require(d >= time.Second && d <= maxLife, "WithRetention(%v): want 1s to %v", d, maxLife)
		o.messages, o.retention = messages, d
	}
}

// WithIdleExpiry sets how long a channel's bookkeeping (its epoch and position)
// outlives its retention when nothing is published any more, by default 24 hours.
// After that the channel is as if it had never been; a listener that was away for
// longer cannot be told what it missed. A second to 10 years.
func WithIdleExpiry(d time.Duration) Option {
	return func(o *options) {
		o.require(d >= time.Second && d <= maxLife, "WithIdleExpiry(%v): want 1s to %v", d, maxLife)
		o.idle = d
	}
}

// WithProbe sets how often the backend asks the server for a sign of life, and how
// long the answer may take before the connection is made anew: by default every 5
// seconds, and 3. The interval is also how often positions are compared
// ([Backend.CheckEvery]). Both are 10 ms to an hour.
func WithProbe(interval, timeout time.Duration) Option {
	return func(o *options) {
		for _, d := range []time.Duration{interval, timeout} {
			o.require(d >= 10*time.Millisecond && d <= time.Hour, "WithProbe(%v): want 10ms to 1h", d)
		}
		o.probeInterval, o.probeTimeout = interval, timeout
	}
}

// WithLogger makes the backend log what it notices and nobody else is told: a
// foreign message in a log, a push that overflowed. By default it is silent.
func WithLogger(logger *slog.Logger) Option {
	return func(o *options) {
		o.require(logger != nil, "WithLogger(nil): want a logger")
		if logger != nil {
			o.logger = logger
		}
	}
}

// WithReplicas sets how many servers of a cluster keep the stream, 1 to 5. A stream
// that exists with another number is refused. Without it a new stream has 1, and an
// existing one any number.
func WithReplicas(n int) Option {
	return func(o *options) {
		o.require(n >= 1 && n <= 5, "WithReplicas(%d): want 1 to 5", n)
		o.replicas = n
	}
}

// WithStorage sets where the stream is kept: jetstream.FileStorage, the default, or
// jetstream.MemoryStorage, which loses everything with the server's process.
func WithStorage(storage jetstream.StorageType) Option {
	return func(o *options) {
		o.require(storage == jetstream.FileStorage || storage == jetstream.MemoryStorage,
			"WithStorage(%d): want FileStorage or MemoryStorage", int(storage))
		o.storage = storage
	}
}

const maxLife = 10 * 365 * 24 * time.Hour

// require keeps the first complaint.
func (o *options) require(ok bool, format string, args ...any) {
	if !ok && o.err == nil {
		o.err = fmt.Errorf("%w: nats: "+format, append([]any{dchannel.ErrInvalidOption}, args...)...)
	}
}

// entryLife is how long an entry lives in the stream. It is longer than the
// retention, because nobody knows at an append whether it will be the last one, and
// the last one is the channel's bookkeeping.
func (o *options) entryLife() time.Duration { return o.retention + o.idle }

// seconds rounds up to whole seconds, the unit of a message's TTL on the server
// (which rounds down), and at least to one.
func seconds(d time.Duration) int64 {
	return max(1, int64((d+time.Second-1)/time.Second))
}
