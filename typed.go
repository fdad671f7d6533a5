package dchannel

import (
	"context"
	"iter"
)

// Typed is a view of a channel whose messages are all T. See [Of].
type Typed[T any] struct{ c *Channel }

// Of returns a view of c that publishes and returns values of type T: strings and
// []byte as they are, anything else by c's codec. It is the same handle: what the
// view returns, c does not return again.
func Of[T any](c *Channel) Typed[T] { return Typed[T]{c} }

// Channel returns the handle.
func (t Typed[T]) Channel() *Channel { return t.c }

// Publish is [Channel.Publish].
func (t Typed[T]) Publish(ctx context.Context, msg T) error { return t.c.Publish(ctx, msg) }

// Listen is [Channel.Listen]. A message that is no T is an error that wraps ErrCodec,
// after which the next call goes on.
func (t Typed[T]) Listen(ctx context.Context) (v T, err error) {
	m, err := t.c.Next(ctx)
	if err == nil {
		err = m.Decode(&v)
	}
	return v, err
}

// Messages is [Channel.Messages]. A message that is no T is yielded as an error that
// wraps ErrCodec, and the iteration goes on.
func (t Typed[T]) Messages(ctx context.Context) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for m, err := range t.c.Messages(ctx) {
			var v T
			if err == nil {
				err = m.Decode(&v)
			}
			if !yield(v, err) {
				return
			}
		}
	}
}
